"""RankTuner in other people's trainers: one file each, which imports that trainer and the losses.

Nothing is imported here: each file needs its trainer, and they cannot all be installed together.
"""
