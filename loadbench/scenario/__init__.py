"""WHAT IS ASKED: scenario files with their prompts and schedules, read, checked and laid out as levels. No traffic.

Its doors: ``load.load_scenario``, ``schema.Scenario``, ``prompts.PromptMix``, ``arrivals.schedule``, ``plan.levels``.
"""
