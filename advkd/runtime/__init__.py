"""Files, devices, processes, profilers' ranges: what every room stands on."""
