"""AI feedback from scratch: completions by several models, ratings by a judge; and dialogues distilled from a teacher."""
