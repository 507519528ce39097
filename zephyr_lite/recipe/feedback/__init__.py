"""AI feedback and dialogues made by other models, as UltraFeedback and UltraChat were made."""
