"""Commands of lingshu that have a file of their own."""
