"""Import-time stand-ins for compiled packages."""
