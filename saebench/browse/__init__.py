"""What the app shows and does, without the app: runs, the table of latents, steering recipes, long work."""
