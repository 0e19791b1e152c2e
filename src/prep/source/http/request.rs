//! One request to an origin, through its redirects, without giving secrets away.
//!
//! Owns [`Origin`]: the URL, and the credentials that were in it, which are never stored, never shown, and sent to no
//! other scheme, host or port than the one they were given for; once a redirect has left that, they are not sent again.
//! Redirects are followed here rather than by the client, bounded by [`REDIRECTS_MAX`]. Answers are not judged here.

use std::time::Duration;

use reqwest::{
    Client, Response, Url,
    header::{ACCEPT_ENCODING, HeaderValue, IF_RANGE, LOCATION, RANGE},
    redirect,
};

use super::{HttpSettings, response::Checksum};
use crate::prep::source::Validator;

/// Redirects of one request.
pub const REDIRECTS_MAX: usize = 10;

/// Where an image is fetched from.
#[derive(Clone)]
pub struct Origin {
    url: Url,
    credentials: Option<(String, Option<String>)>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// Another try may help.
    Broken(String),
    /// It will not.
    Refused(String),
}

impl Origin {
    /// The error says what is wrong with the URL, without showing it.
    pub fn parse(text: &str) -> Result<Origin, String> {
        let mut url = Url::parse(text).map_err(|e| format!("not a URL: {e}"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("{} URLs are not supported, http and https are", url.scheme()));
        }
        if !url.has_host() {
            return Err("the URL has no host".to_owned());
        }
        let decode = |part: &str| percent_decode(part).unwrap_or_else(|| part.to_owned());
        let credentials = (!url.username().is_empty() || url.password().is_some())
            .then(|| (decode(url.username()), url.password().map(decode)));
        strip(&mut url);
        Ok(Origin { url, credentials })
    }

    /// What a record may hold: enough to fetch it again, without user and password.
    pub fn for_record(&self) -> &str {
        self.url.as_str()
    }

    /// What a message may hold: no query either, where signatures are.
    pub fn for_people(&self) -> String {
        let mut url = self.url.clone();
        url.set_query(None);
        url.to_string()
    }
}

/// A client for these settings. It follows nothing and decodes nothing.
pub(super) fn client(origin: &Origin, settings: &HttpSettings) -> Result<Client, String> {
    let builder = Client::builder()
        .user_agent(concat!("bedplate/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .referer(false)
        .http1_only()
        .connect_timeout(settings.connect_timeout);
    match builder.build() {
        Ok(client) => Ok(client),
        // A machine without root certificates can still fetch over plain HTTP.
        Err(_) if origin.url.scheme() == "http" => Client::builder()
            .user_agent(concat!("bedplate/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .referer(false)
            .http1_only()
            .connect_timeout(settings.connect_timeout)
            .tls_certs_only([])
            .build()
            .map_err(describe),
        Err(e) => Err(describe(e)),
    }
}

/// Ask for everything from `position` on. The answer is never a redirect.
pub(super) async fn ask(
    client: &Client,
    origin: &Origin,
    position: u64,
    validator: &Validator,
    checksum: Checksum,
    idle_timeout: Duration,
) -> Result<Response, NoAnswer> {
    let mut url = origin.url.clone();
    let mut credentials = origin.credentials.as_ref();
    for _ in 0..=REDIRECTS_MAX {
        let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some((user, password)) = credentials {
            request = request.basic_auth(user, password.as_ref());
        }
        if position > 0 {
            request = request.header(RANGE, format!("bytes={position}-"));
            match validator {
                Validator::Etag(value) | Validator::LastModified(value) => match HeaderValue::from_str(value)
                {
                    Ok(value) => request = request.header(IF_RANGE, value),
                    Err(_) => return Err(NoAnswer::Refused("the kept validator is damaged".to_owned())),
                },
                Validator::None | Validator::File { .. } => {}
            }
        }
        let response = match tokio::time::timeout(idle_timeout, request.send()).await {
            Err(_) => {
                return Err(NoAnswer::Broken(format!("no answer within {} s", idle_timeout.as_secs_f32())));
            }
            Ok(Err(e)) if e.is_builder() => return Err(NoAnswer::Refused(describe(e))),
            Ok(Err(e)) => return Err(NoAnswer::Broken(describe(e))),
            Ok(Ok(response)) => response,
        };
        if !is_redirect(&response) {
            return Ok(response);
        }
        let next = target(&response, &url).map_err(NoAnswer::Refused)?;
        if url.scheme() == "https" && next.scheme() == "http" && checksum == Checksum::NotGiven {
            let reason = "the origin redirects from https to http, where anyone could change the bytes; give a checksum";
            return Err(NoAnswer::Refused(reason.to_owned()));
        }
        if next.origin() != url.origin() {
            credentials = None;
        }
        url = next;
    }
    Err(NoAnswer::Refused(format!("more than {REDIRECTS_MAX} redirects")))
}

fn is_redirect(response: &Response) -> bool {
    matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn target(response: &Response, from: &Url) -> Result<Url, String> {
    let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
    let location = location.ok_or_else(|| "a redirect without a Location".to_owned())?;
    let mut next = from.join(location).map_err(|_| "a redirect to something that is not a URL".to_owned())?;
    if !matches!(next.scheme(), "http" | "https") {
        return Err(format!("a redirect to a {} URL", next.scheme()));
    }
    // A redirect does not get to choose what we say who we are.
    strip(&mut next);
    Ok(next)
}

/// Take user, password and fragment away. URLs of these schemes have a host, so that it cannot fail.
fn strip(url: &mut Url) {
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
}

/// `%41` is `A`; `None` where that gives no text.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        bytes.extend_from_slice(rest.get(..at)?.as_bytes());
        bytes.push(u8::from_str_radix(rest.get(at + 1..at + 3)?, 16).ok()?);
        rest = rest.get(at + 3..)?;
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

/// The innermost cause, which is what a person can act on; URLs are left out, as they may hold secrets.
pub(super) fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_neither_recorded_nor_shown() {
        let origin = Origin::parse("https://us%40er:s%3Aecret@example.org/a.raw?sig=XYZ#f").unwrap();
        assert_eq!(origin.credentials, Some(("us@er".to_owned(), Some("s:ecret".to_owned()))));
        assert_eq!(origin.for_record(), "https://example.org/a.raw?sig=XYZ");
        assert_eq!(origin.for_people(), "https://example.org/a.raw");
    }

    #[test]
    fn urls_that_are_not_http_are_refused_without_repeating_them() {
        for bad in ["ftp://user:secret@host/x", "http://", "https:///x y", "http://user:secret@:80/"] {
            let error = Origin::parse(bad).err();
            assert!(error.is_none_or(|e| !e.contains("secret")), "{bad}");
        }
        assert!(Origin::parse("ftp://host/x").is_err());
    }
}
