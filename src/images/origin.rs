//! The word after `--from`: what kind of source a request names.

use std::path::PathBuf;

use crate::{
    catalog::name::ImageName,
    prep::source::{http::Origin, upload::UploadSource},
};

/// The source of images that somebody sends.
pub(super) const UPLOAD: &str = "upload";

/// A source, parsed.
pub(super) enum From {
    Path(PathBuf),
    Http(Origin),
    Volume {
        name: String,
        snapshot: Option<String>,
    },
    Image(String),
    /// The bytes that somebody sends; `None` once that can no longer be, as the node was restarted.
    Upload(Option<UploadSource>),
}

impl From {
    /// The error says what is wrong, without repeating what may hold a secret.
    pub(super) fn parse(text: &str) -> Result<From, String> {
        if let Some(name) = text.strip_prefix("image:") {
            // `name~uuid8` is how the second of two images of one name is served.
            let plain = name.split_once('~').map_or(name, |(name, _)| name);
            ImageName::parse(plain).map_err(|e| format!("{text}: {e}"))?;
            return Ok(From::Image(name.to_owned()));
        }
        if let Some(volume) = text.strip_prefix("volume:") {
            let (name, snapshot) = match volume.split_once('@') {
                Some((name, snapshot)) => (name, Some(snapshot.to_owned())),
                None => (volume, None),
            };
            if name.is_empty() || snapshot.as_ref().is_some_and(String::is_empty) {
                return Err(format!("{text}: write volume:NAME or volume:NAME@SNAPSHOT"));
            }
            return Ok(From::Volume { name: name.to_owned(), snapshot });
        }
        if text == UPLOAD {
            return Ok(From::Upload(None));
        }
        if text.starts_with('/') {
            return Ok(From::Path(PathBuf::from(text)));
        }
        if text.contains("://") {
            return Origin::parse(text).map(From::Http);
        }
        Err(format!(
            "{text:?} is no source: an absolute path, an http(s) URL, volume:NAME[@SNAPSHOT], image:NAME or upload is"
        ))
    }

    /// The form that records hold and people see; parses to the same source, without credentials.
    pub(super) fn for_record(&self) -> String {
        match self {
            From::Path(path) => path.display().to_string(),
            From::Http(origin) => origin.for_record().to_owned(),
            From::Volume { name, snapshot: None } => format!("volume:{name}"),
            From::Volume { name, snapshot: Some(snapshot) } => format!("volume:{name}@{snapshot}"),
            From::Image(name) => format!("image:{name}"),
            From::Upload(_) => UPLOAD.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_record_holds_is_the_same_source_without_credentials() {
        for (text, record) in [
            ("/srv/a b.raw", "/srv/a b.raw"),
            ("http://u:p@host/x?y=1", "http://host/x?y=1"),
            ("volume:web", "volume:web"),
            ("volume:web@monday", "volume:web@monday"),
            ("upload", "upload"),
            ("image:debian~0123abcd", "image:debian~0123abcd"),
        ] {
            let from = From::parse(text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(from.for_record(), record);
            assert!(From::parse(record).is_ok_and(|again| again.for_record() == record));
        }
        for bad in [
            "",
            "disk.raw",
            "./disk.raw",
            "ftp://host/x",
            "image:",
            "image:a/b",
            "volume:",
            "volume:a@",
            "s3://b/k",
        ] {
            assert!(From::parse(bad).is_err(), "{bad}");
        }
    }
}
