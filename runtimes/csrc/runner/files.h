// Files that are read whole, and written whole or not at all.
#pragma once

#include <cstdint>
#include <string>

namespace qvdit::runner {

bool is_file(const std::string& path);

// Bytes of a file. Throws Error where there is none.
int64_t file_size(const std::string& path);

// A whole file; more than ``limit`` bytes are refused. what: names it in the Error.
std::string read_file(const std::string& path, const std::string& what, int64_t limit);

// Writes beside ``path``, flushes to disk and renames: a killed run leaves the old file or the new one.
void write_file(const std::string& path, const void* data, size_t bytes);

// Gives a file that was written under another name its own.
void rename_file(const std::string& from, const std::string& to);

// Hex digest of a file.
std::string sha256_file(const std::string& path);

}  // namespace qvdit::runner
