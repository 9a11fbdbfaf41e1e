"""Every method and every solver on points of the plane, whose exact teachers are known: ``advkd toy``."""
