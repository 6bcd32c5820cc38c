"""Jobs of many scans: workers, records and reports. It imports nothing, because workers start without torch."""
