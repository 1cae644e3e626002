//! The admin API, one file per noun. All of it wants the admin key.

mod egresses;
mod live;
mod measurements;
mod media;
pub mod page;
mod recordings;
mod sessions;
mod tickets;
mod timeline;
mod transitions;
mod webhook_events;

use actix_web::web;

use super::resource;

pub use self::timeline::blocking;

pub fn routes(config: &mut web::ServiceConfig) {
    config
        .service(resource("/sessions").route(web::get().to(sessions::list)))
        .service(resource("/sessions/{meetingId}").route(web::get().to(sessions::show)))
        .service(resource("/sessions/{meetingId}/end").route(web::post().to(egresses::end_session)))
        .service(resource("/sessions/{meetingId}/tracks").route(web::get().to(sessions::tracks)))
        .service(resource("/sessions/{meetingId}/measurements").route(web::get().to(measurements::list)))
        .service(resource("/egresses").route(web::get().to(egresses::list)))
        .service(resource("/rooms/{room}/tracks/{sid}/record").route(web::post().to(egresses::record)))
        .service(resource("/rooms/{room}/tracks/{sid}/stop").route(web::post().to(egresses::stop)))
        .service(resource("/sessions/{meetingId}/transitions").route(web::get().to(transitions::list)))
        .service(resource("/webhook-events").route(web::get().to(webhook_events::list)))
        .service(resource("/webhook-events/{id}").route(web::get().to(webhook_events::show)))
        .service(resource("/webhook-events/{id}/replay").route(web::post().to(webhook_events::replay)))
        .service(resource("/recordings").route(web::get().to(recordings::list)))
        .service(resource("/recordings/{id}").route(web::get().to(recordings::show)))
        .service(resource("/recordings/{id}/media").route(web::get().to(media::of_recording)).route(web::head().to(media::of_recording)))
        .service(resource("/segments/{id}/media").route(web::get().to(media::of_segment)).route(web::head().to(media::of_segment)))
        .service(resource("/tracks/live").route(web::get().to(live::list)))
        .service(resource("/tickets").route(web::post().to(tickets::mint)));
}
