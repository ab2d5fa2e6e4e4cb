"""How fast the function is: `make bench`. Nothing here is in the function's image."""
