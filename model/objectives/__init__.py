"""Objectives: plain functions of videos and predictions, and the gradients that the score protocol passes on."""
