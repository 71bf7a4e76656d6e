"""The wording of questions, in English, French and Portuguese; one file a group of tasks."""
