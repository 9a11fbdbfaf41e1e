"""The critic's update: gradient penalty without double backward."""
