"""What the developers of this project run by hand. Not in the wheel."""
