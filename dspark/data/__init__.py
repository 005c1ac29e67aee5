"""Training and evaluation data: prompts, answers, chat templates, loss masks and target features.

Raw files, data sets and models enter; prompts, conversations, `Sample`s with loss masks and cached
target features leave. The commands `dspark data ...`, training, fitting and evaluation call it.
"""
