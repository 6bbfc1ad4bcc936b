"""The commands of `fdistill`, a file each: its arguments (`add`) and what it prints (`run`)."""
