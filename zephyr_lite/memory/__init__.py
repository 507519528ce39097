"""What a run takes in memory and time, and the settings chosen for a device."""
