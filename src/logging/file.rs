//! A log file that starts afresh when it has grown.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kata::timestamp::Utc;

/// Old files that are kept.
const KEPT: usize = 10;

/// A file that lines are appended to.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    /// Bytes; 0: never start afresh.
    limit: u64,
}

impl LogFile {
    /// Opens the file at `path`, which gets the extension `log` if it has none. When it has more than `limit_mb` MB it
    /// is renamed after the time, and a new one is begun; 0 turns that off.
    ///
    /// # Errors
    ///
    /// The file could not be opened.
    pub fn open(path: &Path, limit_mb: u64) -> io::Result<Self> {
        let mut path = std::path::absolute(path)?;
        if path.extension().is_none() {
            path.set_extension("log");
        }
        let file = append(&path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            size,
            limit: limit_mb.saturating_mul(1 << 20),
        })
    }

    pub(super) fn write(&mut self, line: &str) {
        if self.limit > 0 && self.size >= self.limit {
            self.start_afresh();
        }
        if self.file.write_all(line.as_bytes()).is_ok() {
            self.size += line.len() as u64;
        }
    }

    /// On failure the old file is written on.
    fn start_afresh(&mut self) {
        self.size = 0;
        if fs::rename(&self.path, self.old_name(&Utc::now().for_log())).is_err() {
            return;
        }
        if let Ok(file) = append(&self.path) {
            self.file = file;
        }
        let mut old = self.old_files();
        old.sort();
        for path in old.iter().rev().skip(KEPT) {
            let _ = fs::remove_file(path);
        }
    }

    /// `name.2026-11-21T21-46-42.629744.log`.
    fn old_name(&self, time: &str) -> PathBuf {
        let time = time
            .split(" +")
            .next()
            .unwrap_or_default()
            .replace(' ', "T")
            .replace(':', "-");
        let mut name = self.path.file_stem().unwrap_or_default().to_owned();
        name.push(format!(".{time}."));
        name.push(self.path.extension().unwrap_or_default());
        self.path.with_file_name(name)
    }

    fn old_files(&self) -> Vec<PathBuf> {
        let stem = format!("{}.", self.path.file_stem().unwrap_or_default().to_string_lossy());
        let Some(Ok(entries)) = self.path.parent().map(fs::read_dir) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let middle = path
                    .file_stem()
                    .and_then(|name| name.to_str())
                    .and_then(|name| name.strip_prefix(&stem));
                // What looks like our timestamps; nothing else in the directory is ours to remove.
                middle.is_some_and(|time| {
                    time.len() == 26
                        && time
                            .bytes()
                            .all(|byte| byte.is_ascii_digit() || b"-T.".contains(&byte))
                }) && path.extension() == self.path.extension()
            })
            .collect()
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extension_is_added_and_old_lines_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            LogFile::open(&dir.path().join("daemon"), 0)
                .unwrap()
                .write("line\n");
        }
        assert_eq!(
            fs::read_to_string(dir.path().join("daemon.log")).unwrap(),
            "line\nline\n"
        );
    }

    #[test]
    fn a_full_file_is_put_aside_and_few_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("daemon.notes.log");
        fs::write(&other, "not ours").unwrap();
        let mut log = LogFile::open(&dir.path().join("daemon.log"), 1).unwrap();
        let line = "x".repeat((1 << 20) - 1) + "\n";
        for _ in 0..KEPT + 4 {
            log.write(&line);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(log.old_files().len(), KEPT);
        assert_eq!(
            fs::metadata(dir.path().join("daemon.log")).unwrap().len(),
            1 << 20
        );
        assert!(other.exists());
    }
}
