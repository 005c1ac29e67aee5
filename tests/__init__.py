"""The tests of every room, and what they share (`helpers`)."""
