"""How the terminal reads words, opens what they name, and talks back."""
