"""Raw UltraChat → a set like ultrachat_200k: truecasing, refusals filtered, duplicates and evaluation sets taken out."""
