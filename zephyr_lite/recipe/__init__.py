"""How Zephyr's data was made: UltraChat, UltraFeedback, feedback, distillation, ablations."""
