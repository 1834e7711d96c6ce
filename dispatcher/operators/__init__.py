"""What a person does to chains, deliveries and chain types, and what is wrong with a deployment.

It knows every room below. The command line enters at `operations.Operations` and `doctor.Doctor`.
"""
