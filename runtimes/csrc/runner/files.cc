#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <vector>

#include "error.h"
#include "sha256.h"

namespace qvdit::runner {
namespace {

[[noreturn]] void refuse(const std::string& path, int error) {
  throw Error(path + " (" + std::strerror(error) + ")", "a file that can be read and written", "check the path");
}

std::string partial_name(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  const size_t start = slash == std::string::npos ? 0 : slash + 1;
  return path.substr(0, start) + "." + path.substr(start) + ".partial";
}

}  // namespace

bool is_file(const std::string& path) {
  struct stat found;
  return ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode);
}

int64_t file_size(const std::string& path) {
  struct stat found;
  if (::stat(path.c_str(), &found) != 0) refuse(path, errno);
  return found.st_size;
}

std::string read_file(const std::string& path, const std::string& what, int64_t limit) {
  if (!is_file(path)) throw Error("no file " + path, what, "check the path, or make it again");
  const int64_t size = file_size(path);
  if (size > limit) {
    throw Error(path + " of " + std::to_string(size) + " bytes", "at most " + std::to_string(limit), "make it again");
  }
  std::string content(static_cast<size_t>(size), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(content.data(), size)) refuse(path, EIO);
  return content;
}

void write_file(const std::string& path, const void* data, size_t bytes) {
  const std::string partial = partial_name(path);
  const int file = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) refuse(partial, errno);
  const char* next = static_cast<const char*>(data);
  int error = 0;
  while (bytes > 0 && !error) {
    const ssize_t written = ::write(file, next, bytes);
    if (written >= 0) {
      next += written;
      bytes -= static_cast<size_t>(written);
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (!error && ::fsync(file) != 0) error = errno;
  if (::close(file) != 0 && !error) error = errno;
  if (error) {
    ::unlink(partial.c_str());
    refuse(path, error);
  }
  rename_file(partial, path);
}

void rename_file(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) refuse(to, errno);
}

std::string sha256_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path, ENOENT);
  Sha256 digest;
  std::vector<char> chunk(1 << 20);
  while (file.read(chunk.data(), static_cast<std::streamsize>(chunk.size())), file.gcount() > 0) {
    digest.update(chunk.data(), static_cast<size_t>(file.gcount()));
  }
  return digest.hex();
}

}  // namespace qvdit::runner
