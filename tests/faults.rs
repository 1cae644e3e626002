//! What can go wrong around the server: floods, dead peers, crowds, slow requests. The promises are I1, I2, I3, I4 and F12 (`docs/FACTS.md`).

mod crowds;
mod databases;
mod dead_peers;
mod floods;
mod readers;
mod slow;
