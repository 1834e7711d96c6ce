"""Operators' actions on chains, deliveries and chain types, and the doctor that examines a deployment.

It knows every folder below. The command line enters at `operations.Operations` and `doctor.Doctor`.
"""
