"""Commands for the people who maintain mmlane: look at engine releases, keep the table and its tests true."""
