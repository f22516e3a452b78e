"""What every stand-in is made with."""
