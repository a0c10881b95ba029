"""Objectives: plain functions of videos and predictions, and the gradients that workers pass on."""
