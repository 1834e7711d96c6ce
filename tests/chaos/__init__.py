"""The chaos suite: real workers and beats under faults, and one oracle that says what was lost or doubled."""
