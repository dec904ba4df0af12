"""HL7 version 2: messages, and MLLP, which carries them."""
