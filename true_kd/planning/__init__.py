"""`true-kd plan`: what a run will take and leave, from the files at hand and a rehearsal with shallow models."""

from true_kd.planning.forecast import DomainForecast, Forecast, forecast
from true_kd.planning.machines import Fit

__all__ = ["DomainForecast", "Fit", "Forecast", "forecast"]
