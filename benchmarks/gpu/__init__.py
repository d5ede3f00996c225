"""What can only be measured on a GPU."""
