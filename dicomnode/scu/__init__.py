"""The requestor's side of DICOM: associations to peers, and what is asked of them."""
