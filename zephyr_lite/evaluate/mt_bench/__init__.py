"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): 80 questions of two turns, answers graded from 1 to 10 by a judge.

questions.py  the question file, its reference answers and the judge's prompts      scores.py  what the grades say
prompts.py    what the judge is asked, and how its grade is read                    radar.py   the same as a picture
run.py        answers and grades, by one resumable job
"""
