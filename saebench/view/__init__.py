"""Figures and token HTML: data in, Plotly figures and escaped HTML out."""
