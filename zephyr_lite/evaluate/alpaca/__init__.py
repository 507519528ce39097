"""AlpacaEval (Li et al., 2023; Dubois et al., 2024, arXiv 2404.04475): a judge compares a model's answers with a baseline's.

files.py   instructions, outputs and annotations in AlpacaEval's published form      judge.py   what the judge is asked
score.py   win rate as AlpacaEval counts it, and the length-controlled rate          rates.py   verdicts as figures
run.py     answers and verdicts, by one resumable job
"""
