"""The study at work: its loop, its sessions, its scheduled trials, retraining and cost estimates."""
