"""Weights in fewer bits: rounding, calibration, and the layers that run what comes out.

Works on linear layers by their names, so every family of models is quantized the same way.
"""
