"""Our losses inside other libraries' training loops."""
