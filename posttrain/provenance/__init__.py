"""What an output is made from: recorded when it is made, compared before it is skipped or resumed."""
