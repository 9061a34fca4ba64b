"""The attacks, one file each: pure functions of what an observer saw and of what is public."""
