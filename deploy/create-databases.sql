-- Run once, when PostgreSQL's volume is new; `dagster` is made by its image.
CREATE DATABASE mlflow OWNER diffusemix;
