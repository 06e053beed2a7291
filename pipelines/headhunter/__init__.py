"""HeadHunter: which heads to weaken, found by drawing with them."""
