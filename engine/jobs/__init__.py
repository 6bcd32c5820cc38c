"""Many scans: what a job is, who does it, what it leaves. Imports nothing: workers begin with this, without torch."""
