"""From a scan to its labels, stage by stage."""
