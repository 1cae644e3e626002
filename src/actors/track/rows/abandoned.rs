//! Segments whose writer died: the files themselves know how long they are.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use chrono::Utc;

use super::Keeper;
use crate::db::rows::seals::Seal;
use crate::db::rows::{ClosedSegment, EndReason};
use crate::ids::{Identity, TrackSid};
use crate::journal::rows::{OpenedSegment, RowOp};
use crate::recording::path::straight_below;
use crate::recording::repair::{Interrupted, Outcome, repair};
use crate::recording::root::Root;
use crate::sealing::closed_by;

/// A segment that nobody writes any more, and whose row is open.
pub(super) struct Abandoned {
    segment: OpenedSegment,
    /// That it cannot be sealed now.
    is_said: bool,
}

impl Abandoned {
    pub(super) fn all(segments: Vec<OpenedSegment>) -> Vec<Self> {
        segments.into_iter().map(|segment| Self { segment, is_said: false }).collect()
    }
}

impl Keeper {
    /// Ends their rows by what the files say. What may pass (a write or a sync that is still under way and holds the file, a full disk, no descriptors) leaves
    /// a segment held, to be tried again.
    pub(super) async fn close_abandoned(&mut self, abandoned: Vec<Abandoned>) {
        for Abandoned { segment, is_said } in abandoned {
            let (root, relative, interrupted) = (self.root.clone(), segment.path.clone(), self.interrupted(&segment));
            let work = move || repair(&Interrupted { path: path_of(&root, &relative)?, ..interrupted });
            let repaired = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
            let (id, path) = (&segment.id, &segment.path);
            let closed = match repaired {
                Ok(Outcome::Recovered(sidecar) | Outcome::Sealed(sidecar)) => closed_by(id.clone(), &sidecar),
                Ok(Outcome::InUse) => {
                    self.held.push(Abandoned { segment, is_said });
                    continue;
                }
                Ok(Outcome::Bad(aside)) => {
                    log::error!("a segment whose writer died held nothing segment_id={id} kept_as={aside:?}");
                    nothing_of(&segment)
                }
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => {
                    log::error!("a segment whose writer died has no file that could be repaired segment_id={id} path={path:?} error={error}");
                    nothing_of(&segment)
                }
                Err(error) => {
                    if !is_said {
                        log::error!(
                            "a segment whose writer died cannot be sealed now, and is tried again segment_id={id} path={path:?} error={error}"
                        );
                    }
                    self.held.push(Abandoned { segment, is_said: true });
                    continue;
                }
            };
            self.write("segment", RowOp::Closed(closed)).await;
        }
    }

    /// All but its path.
    fn interrupted(&self, segment: &OpenedSegment) -> Interrupted {
        Interrupted {
            path: PathBuf::new(),
            segment_id: Some(segment.id.clone()),
            meeting_id: Some(self.identity.meeting.as_str().to_owned()),
            room_name: Some(self.identity.room.as_str().to_owned()),
            participant: self.identity.participant.clone().map(Identity::into_string),
            track_sid: self.identity.track.clone().map(TrackSid::into_string),
            format: Some(segment.format),
            started_at: Some(segment.started_at),
            session_started_at: self.identity.session_started_at,
            end_reason: Some(EndReason::Failed.as_str()),
        }
    }
}

/// Where a file is by now. A path that leaves the directory, by itself or by a link, is none: there is no such file.
fn path_of(root: &Root, relative: &str) -> io::Result<PathBuf> {
    let directory = root.whereabouts().unwrap_or_else(|_| root.path().to_owned());
    straight_below(&directory, relative)
}

/// How the row of a segment ends of which nothing can be played, as after a start (`sealing::recovery`).
fn nothing_of(segment: &OpenedSegment) -> ClosedSegment {
    ClosedSegment {
        id: segment.id.clone(),
        format: segment.format,
        frames: 0,
        bytes: 0,
        ended_at: Utc::now(),
        reason: EndReason::Failed,
        gaps: Vec::new(),
        seal: Seal { recovered: true, ..Seal::default() },
    }
}
