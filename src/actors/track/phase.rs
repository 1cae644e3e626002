//! Where one connection is in its life, as a pure function.

use crate::db::rows::EndReason;

/// Waiting → Streaming → Draining → Closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Connected; no audio yet.
    Waiting,
    Streaming,
    /// Nothing more is taken in; what there is goes to its place.
    Draining(EndReason),
    /// The file is sealed and its row final.
    Closed(EndReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrackEvent {
    Audio,
    /// The end, whoever wants it.
    End(EndReason),
    /// Everything is in its place.
    Drained,
}

/// What the actor has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    TakeAudio,
    /// Audio behind the end: a sender that was told to go may still be speaking.
    IgnoreAudio,
    Drain(EndReason),
    Release(EndReason),
}

impl Phase {
    #[must_use]
    pub fn on(self, event: TrackEvent) -> (Self, Effect) {
        match (self, event) {
            (Self::Waiting | Self::Streaming, TrackEvent::Audio) => (Self::Streaming, Effect::TakeAudio),
            (Self::Draining(_) | Self::Closed(_), TrackEvent::Audio) => (self, Effect::IgnoreAudio),
            (Self::Waiting | Self::Streaming, TrackEvent::End(reason)) => (Self::Draining(reason), Effect::Drain(reason)),
            // The first end stays.
            (Self::Draining(_) | Self::Closed(_), TrackEvent::End(_)) => (self, Effect::Nothing),
            (Self::Draining(reason), TrackEvent::Drained) => (Self::Closed(reason), Effect::Release(reason)),
            (Self::Waiting | Self::Streaming | Self::Closed(_), TrackEvent::Drained) => (self, Effect::Nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edge() {
        use EndReason::{Closed, Lost};
        use Phase::{Draining, Streaming, Waiting};
        use TrackEvent::{Audio, Drained, End};
        let closed = Phase::Closed(Closed);
        let edges = [
            (Waiting, Audio, Streaming, Effect::TakeAudio),
            (Waiting, End(Lost), Draining(Lost), Effect::Drain(Lost)),
            (Waiting, Drained, Waiting, Effect::Nothing),
            (Streaming, Audio, Streaming, Effect::TakeAudio),
            (Streaming, End(Closed), Draining(Closed), Effect::Drain(Closed)),
            (Streaming, Drained, Streaming, Effect::Nothing),
            (Draining(Closed), Audio, Draining(Closed), Effect::IgnoreAudio),
            (Draining(Closed), End(Lost), Draining(Closed), Effect::Nothing),
            (Draining(Closed), Drained, closed, Effect::Release(Closed)),
            (closed, Audio, closed, Effect::IgnoreAudio),
            (closed, End(Lost), closed, Effect::Nothing),
            (closed, Drained, closed, Effect::Nothing),
        ];
        for (phase, event, next, effect) in edges {
            assert_eq!(phase.on(event), (next, effect), "{phase:?} on {event:?}");
        }
    }
}
