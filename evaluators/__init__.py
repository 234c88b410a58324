"""Training and measuring of architectures on a frozen backbone."""
