"""How fast Instances are acknowledged and scored: this node beside other receivers.

Each receiver is started on the loopback with a fresh folder, warmed by one Instance, and sent CT
slices of 512 x 512 by DCMTK's `storescu`, one process for each association:

- dicomnode receive: `dicomnode serve --only receive`, durable, as it comes (a journal, where this
  version has one); dicomnode receive, files: the same with a file for each Instance
- dicomnode serve: the whole node; its acknowledged rate while it scores, and beside it the scored
  rate, from the first C-STORE until every slice has a score in the database
- pynetdicom storescp, dcmtk storescp (one association at a time), dcmtk storescp --fork (both with
  `+B`): none is durable
- orthanc: as it comes, durable (`SyncStorageArea`)

`nagle` false means TCP_NODELAY=1 for DCMTK on both sides; true is DCMTK as it comes, on both sides.
`slices_per_s` counts from the first C-STORE to the last response. `cpu_ms_per_slice` is of the
receiver's process tree, until acknowledged, or until scored by the whole node. A latency runs from
the first byte of a C-STORE to its response, as a sender of our own sees it that encodes beforehand,
over as many associations at once. Figures are medians over the repeats; latencies are pooled. A
row that is slow is sent fewer slices: what it takes in `SEND_S`.

Ratios are ours / theirs. Except for the last, ours is dicomnode receive:

- orthanc_N, storescp_N: DCMTK's storescp --fork, at N associations without Nagle
- nagle_storescp: DCMTK's plain storescp, Nagle on, one association
- scored_vs_orthanc: scored rate to Orthanc's acknowledged rate, 4 associations, without Nagle

`offset_ms` is the time from the last slice acknowledged to the offset stored, less `quiet_seconds`,
of two Studies of one patient sent at once to the whole node: 600 slices each.

DCMTK's storescp and Orthanc bind every address, so they only run in a network of the benchmark's
own (unshare), where that is permitted.
"""
